"""Certificates: bounds that no attack inside a budget can break, to stand next to what attacks reach."""
