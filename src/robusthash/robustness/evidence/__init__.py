"""Evidence bundles and registry entries: attacked queries and claims that others send in."""
