"""Where time goes: attention over sequence lengths and head counts, and a forward pass kernel by kernel."""
