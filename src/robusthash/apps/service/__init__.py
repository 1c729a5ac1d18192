"""The search service: a trained hasher and an index behind HTTP, with limits, tokens and hardening."""
