"""Attacks of a suite beyond gradients of the plain victim: adaptive, transfer, oracle queries, published."""
