"""Model folders as Hugging Face has them, and goal files: read and written."""
