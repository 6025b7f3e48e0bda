"""What record.py records: every public path on small nets, one module a host."""
