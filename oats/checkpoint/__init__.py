"""Model directories: reading, checking, and writing them so that nothing is ever half there."""
