// What stays in this browser: conversations with their pictures in IndexedDB, preferences in localStorage.
// Where the browser allows neither (some private windows), they last as long as the page.

const STORE = "conversations";
const memory = new Map();
let opening = null;

function open() {
  opening ??= new Promise((resolve) => {
    try {
      const request = indexedDB.open("wicore", 1);
      request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => resolve(null);
    } catch {
      resolve(null);
    }
  });
  return opening;
}

async function run(mode, act) {
  const database = await open();
  if (!database) return undefined;
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(STORE, mode);
    const request = act(transaction.objectStore(STORE));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

/** All conversations, the last used first. */
export async function listConversations() {
  const found = (await run("readonly", (store) => store.getAll())) ?? [...memory.values()];
  return found.filter((each) => each.messages.length).sort((a, b) => b.updated - a.updated);
}

/** Keep one. A browser that is out of space keeps it in memory: losing the page loses it, and only then. */
export async function saveConversation(conversation) {
  memory.set(conversation.id, conversation);
  try {
    await run("readwrite", (store) => store.put(conversation));
  } catch (error) {
    console.warn("the conversation could not be kept", error);
  }
}

/** Forget one. */
export async function removeConversation(id) {
  memory.delete(id);
  await run("readwrite", (store) => store.delete(id));
}

export function newConversation() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  const id = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, created: Date.now(), updated: Date.now(), messages: [] };
}

const PREFIX = "wicore.";
const preferences = new Map();

/** A preference, or `otherwise` where none was set. */
export function preference(name, otherwise) {
  if (preferences.has(name)) return preferences.get(name);
  try {
    const text = localStorage.getItem(PREFIX + name);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}

/** Set one; undefined forgets it. */
export function setPreference(name, value) {
  if (value === undefined) preferences.delete(name);
  else preferences.set(name, value);
  try {
    if (value === undefined) localStorage.removeItem(PREFIX + name);
    else localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // Kept for as long as the page is open.
  }
}
