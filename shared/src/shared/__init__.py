"""What Topeka's labs use: the pytest plugin, comparison against oracles, timing, figures."""
