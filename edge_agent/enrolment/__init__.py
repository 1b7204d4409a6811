"""Who a device is: its keys, its certificate, and how it gets and renews them."""
