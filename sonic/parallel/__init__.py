"""Running the model on several devices, or on one that is too small for it: ranks, messages, sharding, pipelining, offloading."""
