"""LISM, Local Image-Sentence Matching: for every sentence of a caption, the region of the picture it speaks of."""
