"""What protects a run: peer liveness, signals, exit codes."""
