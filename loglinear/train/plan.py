"""What a run would need, without starting it."""
