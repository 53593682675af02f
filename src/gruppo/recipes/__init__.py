"""Every recipe by arXiv id, with its nickname as alias: nicknames collide in the literature, ids do not."""
