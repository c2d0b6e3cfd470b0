"""What each verb of the command does.

A verb imports its modules when it runs, since the libraries that its comment names take from 0.3 to 5 seconds and
`--help` must not wait for them.
"""
