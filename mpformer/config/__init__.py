"""What a run is: one typed, frozen configuration, its presets and published settings; no torch."""
