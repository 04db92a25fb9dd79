"""The fault campaign: kills, damaged bytes and resizes against the real training loop, without Ray's own processes."""
