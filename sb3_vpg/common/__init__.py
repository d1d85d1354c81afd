"""What the public modules are built on. Nothing here is public."""
