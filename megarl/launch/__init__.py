"""Local processes: what a command starts, and that nothing it started outlives it."""
