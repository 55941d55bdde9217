"""How workloads are timed: sessions, measurements, memory, the machine, records and summaries."""
