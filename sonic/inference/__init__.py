"""The main job: conditions, rollout, decoding and writing."""
