"""
Show a verdict as one HTML file without network or script, and as Markdown.

    report → reported_run, chart_sections, table_sections, report_environment → page → templates/
    chart_sections → charts → drawing

Nothing is decided here: every number comes from the verdict or the evidence.
"""
