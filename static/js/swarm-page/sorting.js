/** Tables that are sorted by a click on the name of a column: numbers as numbers, all else as text. */

import { h } from '../dom.js';

/** Give the tables inside of `root` buttons that sort. */
export function watchTables(root) {
  for (const table of root.querySelectorAll('table[data-sortable]')) {
    table.querySelectorAll('thead th').forEach((head, column) => {
      if (head.querySelector('button')) return;
      const button = h('button', { type: 'button', class: 'sort' }, head.textContent);
      button.addEventListener('click', () => {
        const isSame = table.dataset.column === String(column) && table.dataset.order === 'ascending';
        sortTable(table, column, isSame ? 'descending' : 'ascending');
      });
      head.replaceChildren(button);
    });
  }
}

/** Sort the rows of `table` by what their cells of `column` say in data-sort; `order` is ascending or descending. */
export function sortTable(table, column, order) {
  if (!table) return;
  const key = (row) => row.children[column].dataset.sort ?? '';
  const rows = [...table.tBodies[0].rows];
  const areNumbers = rows.every((row) => key(row) !== '' && !Number.isNaN(Number(key(row))));
  const compare = areNumbers ? (a, b) => Number(key(a)) - Number(key(b)) : (a, b) => key(a).localeCompare(key(b));
  rows.sort((a, b) => (order === 'ascending' ? compare(a, b) : compare(b, a)));
  table.tBodies[0].append(...rows);
  Object.assign(table.dataset, { column, order });
  table.querySelectorAll('thead th').forEach((head, number) => {
    if (number === column) head.setAttribute('aria-sort', order);
    else head.removeAttribute('aria-sort');
  });
}
