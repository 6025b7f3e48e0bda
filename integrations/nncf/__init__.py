"""CoRa for NNCF."""
