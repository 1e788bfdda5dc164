"""From one video to frames: fetch, sniff, probe, choose a route, decode, in a child process if asked."""
