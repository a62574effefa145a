"""The names and shapes under which other libraries keep a ViT's weights, one file per library."""
