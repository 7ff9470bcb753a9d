def write_report(folder, found, samples): pass
