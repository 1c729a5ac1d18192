"""What compares many runs: sweeps, curves, figures, transfer, attribution, cost."""
