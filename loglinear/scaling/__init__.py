"""What a machine of several GPUs does with the whole system: parity, resharding, speed, recovery."""
