"""One optimizer per file; each is a memory of gradients, trained by an inner objective."""
