"""What a run did, for people: where its time went, pictures, the page. Any process may read; nothing here decides.

In: the rows, events and scores of a run. Out: seconds by cause, PNG pictures, a page's template.
"""
