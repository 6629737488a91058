"""How good, how fast, how sure: metrics, intervals, latency, gates, probes."""
