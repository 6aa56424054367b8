"""See `interfaces`."""
