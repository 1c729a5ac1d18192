"""The leaderboard: what may stand on one board, in words and as a page."""
