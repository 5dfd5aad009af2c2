"""Where the payloads of the KV cache lie: memory arenas and a log-structured store on NVMe, behind one protocol."""
