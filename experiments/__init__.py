"""Suites, identity, the run store, launching and the command line; no torch outside a job."""
