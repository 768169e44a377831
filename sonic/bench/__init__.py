"""Times the main job and its parts on this machine."""
