"""The packaged hash for copies: hashes of images, and the copies in a folder."""
