"""`wicore bench …`: one command per way of measuring."""
