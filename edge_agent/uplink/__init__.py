"""What a device says and hears: sealed, verified, counted, queued."""
