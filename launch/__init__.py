"""What a person calls on a login node. Never imports torch."""
