"""Records, dashboards and figures."""
