"""The KV cache beyond the slots: identities, what is kept on which tier, and the moves between tiers."""
