"""Analysis of adapters: which tokens of a text they edit, by how much, and along which directions."""
