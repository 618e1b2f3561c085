"""What several test files share: small networks, data, folders, and helpers for the terminal."""
