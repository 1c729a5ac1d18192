"""Deep hashing for retrieval: train, attack, defend, measure, serve."""
