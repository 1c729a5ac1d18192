"""Models from elsewhere as victims: wrapped functions, model files, HTTP endpoints, perceptual hashes."""
