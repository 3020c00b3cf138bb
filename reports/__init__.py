"""Tables, figures and pages from the run store alone; never torch."""
