"""What a compiled model computes, told apart from its names and its weights."""
