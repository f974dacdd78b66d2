"""State-dict names of published networks and ours; one file per system."""
