"""Training: one loop, many objectives, engines that know where the parameters live."""
