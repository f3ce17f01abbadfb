/**
 * Pure: messages as a tree. Each names the one before it as its `parent` (0 for none); messages of one parent are versions of
 * one another, and `chosen` says by parent which of them is shown. What is shown is a path from the first to the last.
 */

const indexes = new WeakMap(); // children by parent, for as long as a list of messages lives

function childrenOf(messages, parent) {
  let index = indexes.get(messages);
  if (!index) {
    index = new Map();
    for (const message of messages) {
      const known = index.get(message.parent);
      if (known) known.push(message);
      else index.set(message.parent, [message]);
    }
    indexes.set(messages, index);
  }
  return index.get(parent) ?? [];
}

/** Return the messages that are shown, first to last. */
export function path({ messages, chosen }) {
  const found = [];
  for (let parent = 0; ; parent = found.at(-1).key) {
    const versions = childrenOf(messages, parent);
    if (!versions.length) return found;
    found.push(versions.find(({ key }) => key === chosen[parent]) ?? versions.at(-1));
  }
}

/** Return the message with this key. */
export function find({ messages }, key) {
  return messages.find((message) => message.key === key) ?? null;
}

/** Return where a message stands among its versions, as {index, count}. */
export function version({ messages }, message) {
  const versions = childrenOf(messages, message.parent);
  return { index: versions.findIndex(({ key }) => key === message.key), count: versions.length };
}

/** Return the tree with the version `step` before or behind this message shown; the same at the first and the last. */
export function switchVersion(tree, key, step) {
  const message = find(tree, key);
  const versions = childrenOf(tree.messages, message.parent);
  const next = versions[versions.indexOf(message) + step];
  return next ? { ...tree, chosen: { ...tree.chosen, [message.parent]: next.key } } : tree;
}

/** Return the tree with a message behind `parent`, and shown; it gets the next key. */
export function add(tree, parent, message) {
  const key = tree.nextKey;
  return {
    ...tree,
    messages: [...tree.messages, { ...message, key, parent }],
    chosen: { ...tree.chosen, [parent]: key },
    nextKey: key + 1,
  };
}

/** Return the tree with a message changed. */
export function replace(tree, key, change) {
  return { ...tree, messages: tree.messages.map((message) => (message.key === key ? { ...message, ...change } : message)) };
}

/** Return the tree without a message that nothing follows. */
export function remove(tree, key) {
  const { [find(tree, key).parent]: _, ...chosen } = tree.chosen;
  return { ...tree, messages: tree.messages.filter((message) => message.key !== key), chosen };
}
