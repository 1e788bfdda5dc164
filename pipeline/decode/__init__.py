"""Decode one video into frames: fetch, sniff, probe, choose a route and decode, optionally in a child process."""
