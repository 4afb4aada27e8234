"""What a run tells its users: metrics, progress, pictures."""
